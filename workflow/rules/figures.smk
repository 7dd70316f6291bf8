# canaries.npz, summary/epsilon.csv -> figures/figure1, figure2: pdf, png


rule plot_figure1:
    input:
        canaries="<results>/canaries/{}/{}/canaries.npz".format(
            STAGES.name_dataset(config["figures"]["figure1_dataset"]), config["figures"]["figure1_canary"]
        ),
    output:
        pdf="<results>/figures/figure1.pdf",
        png=report("<results>/figures/figure1.png", caption="../report/figure1.rst", category="Figures"),
    log:
        "<logs>/plot_figure1.log",
    benchmark:
        "<benchmarks>/plot_figure1.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("figure1"),
        config_digest=config_digest("figure1"),
        code=sources("plot_figure1.py"),
    message:
        "Plotting figure 1"
    script:
        "../scripts/plot_figure1.py"


rule plot_figure2:
    input:
        summary="<results>/summary/epsilon.csv",
    output:
        pdf="<results>/figures/figure2.pdf",
        png=report("<results>/figures/figure2.png", caption="../report/figure2.rst", category="Figures"),
    log:
        "<logs>/plot_figure2.log",
    benchmark:
        "<benchmarks>/plot_figure2.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("figure2"),
        config_digest=config_digest("figure2"),
        code=sources("plot_figure2.py"),
    message:
        "Plotting figure 2"
    script:
        "../scripts/plot_figure2.py"
