rule table:
    input:
        jobs.parts("tables"),
        published=local(PUBLISHED),
    output:
        html=report(
            jobs.path("table", form="html"),
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "to read"},
        ),
        csv=report(
            jobs.path("table", form="csv"),
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "CSV"},
        ),
        md=report(
            jobs.path("table", form="md"),
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "Markdown"},
        ),
        tex=report(
            jobs.path("table", form="tex"),
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "LaTeX"},
        ),
    log:
        jobs.log("table", "table"),
    benchmark:
        jobs.benchmark("table", "table")
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        settings=jobs.settings("tables"),
        results=subpath(output[0], ancestor=2),
        stem=subpath(output.csv, strip_suffix=".csv"),
        code=jobs.code("report.table"),
    message:
        "Making the table {wildcards.table}"
    shell:
        "obr table {wildcards.table} --config {params.settings} --results {params.results} "
        "--published {input.published} --out {params.stem} >{log} 2>&1"


rule figure:
    input:
        jobs.parts("figures"),
        published=local(PUBLISHED),
    output:
        jobs.path("figure", form="pdf"),
        report(
            jobs.path("figure", form="png"),
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        jobs.log("figure", "figure"),
    benchmark:
        jobs.benchmark("figure", "figure")
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        settings=jobs.settings("figures"),
        results=subpath(output[0], ancestor=2),
        stem=subpath(output[0], strip_suffix=".pdf"),
        code=jobs.code("report.figures.draw"),
    message:
        "Drawing the figure {wildcards.figure}"
    shell:
        "obr figure {wildcards.figure} --config {params.settings} --results {params.results} "
        "--published {input.published} --out {params.stem} >{log} 2>&1"


rule errata:
    input:
        published=local(PUBLISHED),
    output:
        report(
            jobs.path("errata"),
            caption="../report/errata.rst",
            category="Errata",
            labels={"format": "Markdown"},
        ),
    log:
        jobs.log("errata"),
    benchmark:
        jobs.benchmark("errata")
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=jobs.code("report.errata"),
    message:
        "Listing what is odd in the published tables"
    shell:
        "obr errata --published {input.published} --out {output} >{log} 2>&1"
