# scores/{cell} -> audits/{cell}/epsilon.csv -> summary/epsilon.csv


rule compute_epsilon:
    input:
        scores=of_cell("<results>/scores/<cell>/block{block}.csv"),
        runs=of_cell("<results>/scores/<cell>/runs{block}.csv"),
        population=of_cell("<results>/scores/<cell>/population{block}.npz"),
    output:
        epsilon="<results>/audits/<cell>/epsilon.csv",
    log:
        "<logs>/compute_epsilon/<cell>.log",
    benchmark:
        "<benchmarks>/compute_epsilon/<cell>.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(4000),
        runtime=scaled(60),
    params:
        settings=settings("audits"),
        config_digest=config_digest("audits"),
        code=sources("compute_epsilon.py"),
    message:
        "Auditing {wildcards.canary} canaries: {wildcards.training}, epsilon {wildcards.epsilon}"
    script:
        "../scripts/compute_epsilon.py"


rule collect_epsilon:
    input:
        audits=TARGETS["audits"],
    output:
        summary="<results>/summary/epsilon.csv",
    log:
        "<logs>/collect_epsilon.log",
    benchmark:
        "<benchmarks>/collect_epsilon.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("summary"),
        config_digest=config_digest("summary"),
        code=sources("collect_epsilon.py"),
    message:
        "Collecting the audits of all cells"
    script:
        "../scripts/collect_epsilon.py"
