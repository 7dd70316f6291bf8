# summary/epsilon.csv, scores/{cell}, canaries.npz, benchmarks -> audits.html

TEMPLATES = [Path(workflow.basedir, "metacanary", f"report_page.{suffix}") for suffix in ("html", "css", "js")]

# The jobs of this config that the audits need: they have ended, others may be running.
AUDITED = STAGES.bundled()
COSTED = {
    "make_canaries": [kind for kind in AUDITED["canaries"] if kind["canary"] in PLAIN],
    "optimize_canaries": [kind for kind in AUDITED["canaries"] if kind["canary"] in OPTIMIZED],
    "pretrain_model": [{"pretraining": name} for name in sorted(config["pretrainings"])],
    "train_audit_models": AUDITED["scores"],
    "score_membership": AUDITED["scores"],
    "compute_epsilon": AUDITED["audits"],
    "collect_epsilon": AUDITED["summary"],
}
# As plain text: what Snakemake has is tied to its rule, which cannot be given to a script.
PATTERNS = {name: str(getattr(rules, name).benchmark) for name in COSTED}
BENCHMARKS = {name: [PATTERNS[name].format(**job) for job in COSTED[name]] for name in COSTED}


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
        benchmarks=BENCHMARKS,
    message:
        "Making the page of all audits"
    script:
        "../scripts/make_report_page.py"
