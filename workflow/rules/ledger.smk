# coins and Poisson draws of runs -> dirac/{dataset}/{training}/eps{epsilon}; with summary/epsilon.csv -> tables/ledger: csv, md, tex; figures/ledger: pdf, png


rule score_dirac:
    output:
        scores="<results>/dirac/{dataset}/{training}/eps{epsilon}/scores.csv",
        runs="<results>/dirac/{dataset}/{training}/eps{epsilon}/runs.csv",
    log:
        "<logs>/score_dirac/{dataset}/{training}/eps{epsilon}.log",
    benchmark:
        "<benchmarks>/score_dirac/{dataset}/{training}/eps{epsilon}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(4000),
        runtime=scaled(60),
    params:
        settings=settings("dirac"),
        config_digest=config_digest("dirac"),
        code=sources("score_dirac.py"),
    message:
        "Scoring Dirac canaries: {wildcards.training}, epsilon {wildcards.epsilon}"
    script:
        "../scripts/score_dirac.py"


rule audit_dirac:
    input:
        scores="<results>/dirac/{dataset}/{training}/eps{epsilon}/scores.csv",
        runs="<results>/dirac/{dataset}/{training}/eps{epsilon}/runs.csv",
    output:
        epsilon="<results>/dirac/{dataset}/{training}/eps{epsilon}/epsilon.csv",
    log:
        "<logs>/audit_dirac/{dataset}/{training}/eps{epsilon}.log",
    benchmark:
        "<benchmarks>/audit_dirac/{dataset}/{training}/eps{epsilon}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(4000),
        runtime=scaled(60),
    params:
        settings=settings("dirac_audits"),
        config_digest=config_digest("dirac_audits"),
        code=sources("audit_dirac.py"),
    message:
        "Auditing Dirac canaries: {wildcards.training}, epsilon {wildcards.epsilon}"
    script:
        "../scripts/audit_dirac.py"


rule make_ledger:
    input:
        summary="<results>/summary/epsilon.csv",
        dirac=of_ledger("<results>/dirac/{dataset}/{training}/eps{epsilon}/epsilon.csv"),
    output:
        csv=report("<results>/tables/ledger.csv", caption="../report/ledger.rst", category="Tables"),
        markdown="<results>/tables/ledger.md",
        latex="<results>/tables/ledger.tex",
    log:
        "<logs>/make_ledger.log",
    benchmark:
        "<benchmarks>/make_ledger.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("ledger"),
        config_digest=config_digest("ledger"),
        code=sources("make_ledger.py"),
    message:
        "Making the ledger of epsilon"
    script:
        "../scripts/make_ledger.py"


rule plot_ledger:
    input:
        table="<results>/tables/ledger.csv",
    output:
        pdf="<results>/figures/ledger.pdf",
        png=report("<results>/figures/ledger.png", caption="../report/ledger.rst", category="Figures"),
    log:
        "<logs>/plot_ledger.log",
    benchmark:
        "<benchmarks>/plot_ledger.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("ledger_figure"),
        config_digest=config_digest("ledger_figure"),
        code=sources("plot_ledger.py"),
    message:
        "Plotting the ledger of epsilon"
    script:
        "../scripts/plot_ledger.py"
