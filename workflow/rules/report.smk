# summary/epsilon.csv, scores/{cell}, canaries.npz, benchmarks -> audits.html

TEMPLATES = [Path(workflow.basedir, "metacanary", f"report_page.{suffix}") for suffix in ("html", "css", "js")]


rule make_report_page:
    input:
        summary=bundled("summary", "<results>/summary/epsilon.csv"),
        scores=bundled("scores", "<results>/scores/<cell>/block{block}.csv"),
        runs=bundled("runs", "<results>/scores/<cell>/runs{block}.csv"),
        population=bundled("population", "<results>/scores/<cell>/population{block}.npz"),
        canaries=bundled("canaries", "<results>/canaries/{dataset}/{canary}/canaries.npz"),
    output:
        page=report("<results>/audits.html", caption="../report/audits.rst", category="Page of all audits"),
    log:
        "<logs>/make_report_page.log",
    benchmark:
        "<benchmarks>/make_report_page.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(4000),
        runtime=scaled(10),
    params:
        settings=settings("report_page"),
        config_digest=config_digest("report_page"),
        code=sources("make_report_page.py"),
        templates=store.digest([path.read_text(encoding="utf-8") for path in TEMPLATES]),
        benchmarks=str(Path(config["results_dir"], "benchmarks")),
    message:
        "Making the page of all audits"
    script:
        "../scripts/make_report_page.py"
