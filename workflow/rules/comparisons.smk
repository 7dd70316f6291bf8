# summary/epsilon.csv -> tables/comparison_{comparison}, figures/comparison_{comparison}; by cost also
# history.csv, models, scores, audits -> summary/cost.csv


rule collect_cost:
    input:
        optimize_canaries=of_costs("optimize_canaries", "<results>/canaries/{dataset}/{canary}/history.csv"),
        train_audit_models=of_costs("train_audit_models", "<results>/models/<cell>/block{block}.npz"),
        score_membership=of_costs("score_membership", "<results>/scores/<cell>/runs{block}.csv"),
        compute_epsilon=of_costs("compute_epsilon", "<results>/audits/<cell>/epsilon.csv"),
    output:
        cost="<results>/summary/cost.csv",
    log:
        "<logs>/collect_cost.log",
    benchmark:
        "<benchmarks>/collect_cost.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("cost"),
        config_digest=config_digest("cost"),
        code=sources("collect_cost.py"),
    message:
        "Collecting what jobs cost"
    script:
        "../scripts/collect_cost.py"


rule make_comparison:
    input:
        summary="<results>/summary/epsilon.csv",
        cost=compared_cost,
    output:
        csv=report(
            "<results>/tables/comparison_{comparison}.csv",
            caption="../report/comparison.rst",
            category="Comparisons",
            labels={"comparison": "{comparison}", "form": "table"},
        ),
        markdown="<results>/tables/comparison_{comparison}.md",
        latex="<results>/tables/comparison_{comparison}.tex",
    log:
        "<logs>/make_comparison/{comparison}.log",
    benchmark:
        "<benchmarks>/make_comparison/{comparison}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("comparison"),
        config_digest=config_digest("comparison"),
        code=sources("make_comparison.py"),
    message:
        "Making the table of comparison {wildcards.comparison}"
    script:
        "../scripts/make_comparison.py"


rule plot_comparison:
    input:
        table="<results>/tables/comparison_{comparison}.csv",
    output:
        pdf="<results>/figures/comparison_{comparison}.pdf",
        png=report(
            "<results>/figures/comparison_{comparison}.png",
            caption="../report/comparison.rst",
            category="Comparisons",
            labels={"comparison": "{comparison}", "form": "figure"},
        ),
    log:
        "<logs>/plot_comparison/{comparison}.log",
    benchmark:
        "<benchmarks>/plot_comparison/{comparison}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("comparison_figure"),
        config_digest=config_digest("comparison_figure"),
        code=sources("plot_comparison.py"),
    message:
        "Plotting comparison {wildcards.comparison}"
    script:
        "../scripts/plot_comparison.py"
