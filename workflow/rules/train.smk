# data/{dataset}, canaries.npz, pretrained/{pretraining}/model.npz -> models/{cell}/block{block}.npz -> scores/{cell}/block{block}.csv


rule train_audit_models:
    input:
        dataset=stored_dataset,
        canaries="<results>/canaries/{dataset}/{canary}/canaries.npz",
        pretrained=pretrained_model,
    output:
        models="<results>/models/<cell>/block{block}.npz",
    log:
        "<logs>/train_audit_models/<cell>/block{block}.log",
    benchmark:
        "<benchmarks>/train_audit_models/<cell>/block{block}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=scaled(16000),
        runtime=scaled(720),
    params:
        settings=settings("models"),
        config_digest=config_digest("models"),
        code=sources("train_audit_models.py"),
        checkpoints=checkpoints("models"),
    message:
        "Training models with {wildcards.canary} canaries: {wildcards.training}, epsilon {wildcards.epsilon}, block {wildcards.block}"
    script:
        "../scripts/train_audit_models.py"


rule score_membership:
    input:
        dataset=stored_dataset,
        canaries="<results>/canaries/{dataset}/{canary}/canaries.npz",
        models="<results>/models/<cell>/block{block}.npz",
    output:
        scores="<results>/scores/<cell>/block{block}.csv",
        runs="<results>/scores/<cell>/runs{block}.csv",
        population="<results>/scores/<cell>/population{block}.npz",
    log:
        "<logs>/score_membership/<cell>/block{block}.log",
    benchmark:
        "<benchmarks>/score_membership/<cell>/block{block}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(8000),
        runtime=scaled(60),
    params:
        settings=settings("scores"),
        config_digest=config_digest("scores"),
        code=sources("score_membership.py"),
    message:
        "Scoring {wildcards.canary} canaries: {wildcards.training}, epsilon {wildcards.epsilon}, block {wildcards.block}"
    script:
        "../scripts/score_membership.py"
