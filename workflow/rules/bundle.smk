# summary, audits, scores, canaries.npz, other CSV files -> bundle: Parquet files, JSON, datasheet.md, SHA256SUMS


rule make_bundle:
    input:
        summary=bundled("summary", "<results>/summary/epsilon.csv"),
        audits=bundled("audits", "<results>/audits/<cell>/epsilon.csv"),
        scores=bundled("scores", "<results>/scores/<cell>/block{block}.csv"),
        runs=bundled("runs", "<results>/scores/<cell>/runs{block}.csv"),
        population=bundled("population", "<results>/scores/<cell>/population{block}.npz"),
        canaries=bundled("canaries", "<results>/canaries/{dataset}/{canary}/canaries.npz"),
        histories=bundled("histories", "<results>/canaries/{dataset}/{canary}/history.csv"),
        metasmoothness=bundled("metasmoothness", "<results>/metasmoothness/{dataset}/{canary}.csv"),
        trials=bundled("trials", "<results>/tan/{dataset}/{trial}.csv"),
        cost=bundled("cost", "<results>/summary/cost.csv"),
    output:
        BUNDLE,
    log:
        "<logs>/make_bundle.log",
    benchmark:
        "<benchmarks>/make_bundle.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(8000),
        runtime=scaled(60),
    params:
        settings=settings("bundle"),
        config_digest=config_digest("bundle"),
        code=sources("make_bundle.py"),
    message:
        "Bundling the scores and audits of all cells"
    script:
        "../scripts/make_bundle.py"
