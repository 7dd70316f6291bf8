# summary/epsilon.csv -> tables/table1, table2, bounds, reproduction: csv, md, tex


rule make_table1:
    input:
        summary="<results>/summary/epsilon.csv",
    output:
        csv=report("<results>/tables/table1.csv", caption="../report/table1.rst", category="Tables"),
        markdown="<results>/tables/table1.md",
        latex="<results>/tables/table1.tex",
    log:
        "<logs>/make_table1.log",
    benchmark:
        "<benchmarks>/make_table1.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("table1"),
        config_digest=config_digest("table1"),
        code=sources("make_table1.py"),
    message:
        "Making table 1"
    script:
        "../scripts/make_table1.py"


rule make_table2:
    input:
        summary="<results>/summary/epsilon.csv",
    output:
        csv=report("<results>/tables/table2.csv", caption="../report/table2.rst", category="Tables"),
        markdown="<results>/tables/table2.md",
        latex="<results>/tables/table2.tex",
    log:
        "<logs>/make_table2.log",
    benchmark:
        "<benchmarks>/make_table2.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("table2"),
        config_digest=config_digest("table2"),
        code=sources("make_table2.py"),
    message:
        "Making table 2"
    script:
        "../scripts/make_table2.py"


rule make_bounds:
    input:
        summary="<results>/summary/epsilon.csv",
    output:
        csv=report("<results>/tables/bounds.csv", caption="../report/bounds.rst", category="Tables"),
        markdown="<results>/tables/bounds.md",
        latex="<results>/tables/bounds.tex",
    log:
        "<logs>/make_bounds.log",
    benchmark:
        "<benchmarks>/make_bounds.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("bounds"),
        config_digest=config_digest("bounds"),
        code=sources("make_bounds.py"),
    message:
        "Making the table of all bounds"
    script:
        "../scripts/make_bounds.py"


rule make_reproduction:
    input:
        summary="<results>/summary/epsilon.csv",
        published=ancient(str(_stages.PUBLISHED)),  # a change of what it says is a change of settings
    output:
        csv=report("<results>/tables/reproduction.csv", caption="../report/reproduction.rst", category="Tables"),
        markdown="<results>/tables/reproduction.md",
        latex="<results>/tables/reproduction.tex",
    log:
        "<logs>/make_reproduction.log",
    benchmark:
        "<benchmarks>/make_reproduction.tsv"
    conda:
        "../../envs/metacanary.yaml"
    threads: 1
    resources:
        mem_mb=scaled(2000),
        runtime=scaled(10),
    params:
        settings=settings("reproduction"),
        config_digest=config_digest("reproduction"),
        code=sources("make_reproduction.py"),
    message:
        "Putting published numbers beside ours"
    script:
        "../scripts/make_reproduction.py"
