# data/{dataset} -> canaries/{dataset}/{canary}: canaries.npz, and history.csv of an optimisation


rule make_canaries:
    input:
        dataset=stored_dataset,
    output:
        canaries="<results>/canaries/{dataset}/{canary}/canaries.npz",
    log:
        "<logs>/make_canaries/{dataset}/{canary}.log",
    benchmark:
        "<benchmarks>/make_canaries/{dataset}/{canary}.tsv"
    wildcard_constraints:
        canary=_config.either(PLAIN),
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(4000),
        runtime=scaled(10),
    params:
        settings=settings("canaries"),
        config_digest=config_digest("canaries"),
        code=sources("make_canaries.py"),
    message:
        "Making {wildcards.canary} canaries of {wildcards.dataset}"
    script:
        "../scripts/make_canaries.py"


rule optimize_canaries:
    input:
        dataset=stored_dataset,
    output:
        canaries="<results>/canaries/{dataset}/{canary}/canaries.npz",
        history=report(
            "<results>/canaries/{dataset}/{canary}/history.csv",
            caption="../report/history.rst",
            category="Canaries",
            labels={"dataset": "{dataset}", "canary": "{canary}"},
        ),
    log:
        "<logs>/optimize_canaries/{dataset}/{canary}.log",
    benchmark:
        "<benchmarks>/optimize_canaries/{dataset}/{canary}.tsv"
    wildcard_constraints:
        canary=_config.either(OPTIMIZED),
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=scaled(16000),
        runtime=scaled(720),
    params:
        settings=settings("canaries"),
        config_digest=config_digest("canaries"),
        code=sources("optimize_canaries.py"),
        checkpoints=checkpoints("canaries"),
    message:
        "Optimising {wildcards.canary} canaries of {wildcards.dataset}"
    script:
        "../scripts/optimize_canaries.py"
