# 500 jobs of one second, to count what they ask of the scheduler.
rule all:
    input:
        expand("done/{number}", number=range(500)),
    localrule: True


rule one:
    output:
        "done/{number}",
    shell:
        "sleep 1; touch {output:q}"
