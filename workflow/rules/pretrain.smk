# data/{dataset} -> pretrained/{pretraining}/model.npz, which all trainings that name it start from


rule pretrain_model:
    input:
        dataset=pretraining_dataset,
    output:
        model="<results>/pretrained/{pretraining}/model.npz",
    log:
        "<logs>/pretrain_model/{pretraining}.log",
    benchmark:
        "<benchmarks>/pretrain_model/{pretraining}.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=scaled(16000),
        runtime=scaled(720),
    params:
        settings=settings("pretrained"),
        config_digest=config_digest("pretrained"),
        code=sources("pretrain_model.py"),
        checkpoints=checkpoints("pretrained"),
    message:
        "Pretraining {wildcards.pretraining}"
    script:
        "../scripts/pretrain_model.py"
