# config -> data/{dataset}/*.npy


rule download:
    output:
        train_images="<data>/{dataset}/train_images.npy",
        train_labels="<data>/{dataset}/train_labels.npy",
        test_images="<data>/{dataset}/test_images.npy",
        test_labels="<data>/{dataset}/test_labels.npy",
        provenance="<data>/{dataset}/provenance.json",
    log:
        "<data>/logs/download/{dataset}.log",
    benchmark:
        "<data>/benchmarks/download/{dataset}.tsv"
    wildcard_constraints:
        dataset=_config.either({*config["datasets"], *(p["dataset"] for p in config["pretrainings"].values())}),
    localrule: True
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(4000),
        runtime=scaled(60),
    params:
        settings=settings("dataset"),
        config_digest=config_digest("dataset"),
    message:
        "Fetching and verifying {wildcards.dataset}"
    script:
        "../scripts/download.py"
