# data/{dataset}, history.csv -> metasmoothness/{dataset}/{canary}.csv -> tables/metasmoothness, figures/metasmoothness


rule measure_metasmoothness:
    input:
        dataset=stored_dataset,
    output:
        measured="<results>/metasmoothness/{dataset}/{canary}.csv",
    log:
        "<logs>/measure_metasmoothness/{dataset}/{canary}.log",
    benchmark:
        "<benchmarks>/measure_metasmoothness/{dataset}/{canary}.tsv"
    wildcard_constraints:
        canary=_config.either(VARIANTS),
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=scaled(16000),
        runtime=scaled(240),
    params:
        settings=settings("metasmoothness"),
        config_digest=config_digest("metasmoothness"),
        code=sources("measure_metasmoothness.py"),
    message:
        "Measuring the metasmoothness of {wildcards.canary} on {wildcards.dataset}"
    script:
        "../scripts/measure_metasmoothness.py"


rule make_metasmoothness:
    input:
        measured=of_variants("<results>/metasmoothness/{dataset}/{canary}.csv"),
        histories=of_variants("<results>/canaries/{dataset}/{canary}/history.csv"),
    output:
        csv=report("<results>/tables/metasmoothness.csv", caption="../report/metasmoothness.rst", category="Tables"),
        markdown="<results>/tables/metasmoothness.md",
        latex="<results>/tables/metasmoothness.tex",
    log:
        "<logs>/make_metasmoothness.log",
    benchmark:
        "<benchmarks>/make_metasmoothness.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("metasmoothness_table"),
        config_digest=config_digest("metasmoothness_table"),
        code=sources("make_metasmoothness.py"),
    message:
        "Making the table of metasmoothness"
    script:
        "../scripts/make_metasmoothness.py"


rule plot_metasmoothness:
    input:
        table="<results>/tables/metasmoothness.csv",
    output:
        pdf="<results>/figures/metasmoothness.pdf",
        png=report("<results>/figures/metasmoothness.png", caption="../report/metasmoothness.rst", category="Figures"),
    log:
        "<logs>/plot_metasmoothness.log",
    benchmark:
        "<benchmarks>/plot_metasmoothness.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("metasmoothness_figure"),
        config_digest=config_digest("metasmoothness_figure"),
        code=sources("plot_metasmoothness.py"),
    message:
        "Plotting metasmoothness"
    script:
        "../scripts/plot_metasmoothness.py"
