# summary/epsilon.csv, summary/cost.csv -> tables/accuracy: csv, md, tex; figures/accuracy: pdf, png


rule make_accuracy:
    input:
        summary="<results>/summary/epsilon.csv",
        cost="<results>/summary/cost.csv",
    output:
        csv=report("<results>/tables/accuracy.csv", caption="../report/accuracy.rst", category="Tables"),
        markdown="<results>/tables/accuracy.md",
        latex="<results>/tables/accuracy.tex",
    log:
        "<logs>/make_accuracy.log",
    benchmark:
        "<benchmarks>/make_accuracy.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("accuracy"),
        config_digest=config_digest("accuracy"),
        code=sources("make_accuracy.py"),
    message:
        "Making the table of accuracy"
    script:
        "../scripts/make_accuracy.py"


rule plot_accuracy:
    input:
        table="<results>/tables/accuracy.csv",
    output:
        pdf="<results>/figures/accuracy.pdf",
        png=report("<results>/figures/accuracy.png", caption="../report/accuracy.rst", category="Figures"),
    log:
        "<logs>/plot_accuracy.log",
    benchmark:
        "<benchmarks>/plot_accuracy.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("accuracy_figure"),
        config_digest=config_digest("accuracy_figure"),
        code=sources("plot_accuracy.py"),
    message:
        "Plotting accuracy"
    script:
        "../scripts/plot_accuracy.py"
