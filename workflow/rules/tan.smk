# data/{dataset} -> tan/{dataset}/{trial}.csv -> tables/tan, figures/tan


rule train_tan:
    input:
        dataset=stored_dataset,
        searched=searched_trials,
    output:
        runs="<results>/tan/{dataset}/{trial}.csv",
    log:
        "<logs>/train_tan/{dataset}/{trial}.log",
    benchmark:
        "<benchmarks>/train_tan/{dataset}/{trial}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=scaled(16000),
        runtime=scaled(720),
    params:
        settings=settings("tan"),
        config_digest=config_digest("tan"),
        code=sources("train_tan.py"),
        checkpoints=checkpoints("tan"),
    message:
        "Training without canaries on {wildcards.dataset}: {wildcards.trial}"
    script:
        "../scripts/train_tan.py"


rule make_tan:
    input:
        trials=of_trials("<results>/tan/{dataset}/{trial}.csv"),
    output:
        csv=report("<results>/tables/tan.csv", caption="../report/tan.rst", category="Tables"),
        markdown="<results>/tables/tan.md",
        latex="<results>/tables/tan.tex",
    log:
        "<logs>/make_tan.log",
    benchmark:
        "<benchmarks>/make_tan.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("tan_table"),
        config_digest=config_digest("tan_table"),
        code=sources("make_tan.py"),
    message:
        "Making the table of total noise"
    script:
        "../scripts/make_tan.py"


rule plot_tan:
    input:
        table="<results>/tables/tan.csv",
    output:
        pdf="<results>/figures/tan.pdf",
        png=report("<results>/figures/tan.png", caption="../report/tan.rst", category="Figures"),
    log:
        "<logs>/plot_tan.log",
    benchmark:
        "<benchmarks>/plot_tan.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("tan_figure"),
        config_digest=config_digest("tan_figure"),
        code=sources("plot_tan.py"),
    message:
        "Plotting accuracy against total noise"
    script:
        "../scripts/plot_tan.py"
