rule table:
    input:
        parts_of("tables"),
        published=local(PUBLISHED),
    output:
        html=report(
            f"{RESULTS}/tables/{{table}}.html",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "to read"},
        ),
        csv=report(
            f"{RESULTS}/tables/{{table}}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "CSV"},
        ),
        md=report(
            f"{RESULTS}/tables/{{table}}.md",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "Markdown"},
        ),
        tex=report(
            f"{RESULTS}/tables/{{table}}.tex",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "format": "LaTeX"},
        ),
    log:
        f"{RESULTS}/logs/table/{{table}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/table/{{table}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        entry=entry_of("tables"),
        recipes=used("tables", "recipes"),
        models=used("tables", "models"),
        results=subpath(output[0], ancestor=2),
        stem=subpath(output.csv, strip_suffix=".csv"),
        code=code_of("report.table"),
    shell:
        "obr table --entry {params.entry:q} --recipes {params.recipes:q} --models {params.models:q} "
        "--results {params.results} --published {input.published} --out {params.stem} >{log} 2>&1"


rule figure:
    input:
        parts_of("figures"),
        published=local(PUBLISHED),
    output:
        f"{RESULTS}/figures/{{figure}}.pdf",
        report(
            f"{RESULTS}/figures/{{figure}}.png",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        f"{RESULTS}/logs/figure/{{figure}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/figure/{{figure}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        entry=entry_of("figures"),
        recipes=used("figures", "recipes"),
        models=used("figures", "models"),
        shapes=figure_shapes,
        results=subpath(output[0], ancestor=2),
        stem=subpath(output[0], strip_suffix=".pdf"),
        code=code_of("report.figures.draw"),
    shell:
        "obr figure --entry {params.entry:q} --recipes {params.recipes:q} --models {params.models:q} {params.shapes} "
        "--results {params.results} --published {input.published} --out {params.stem} >{log} 2>&1"


rule errata:
    input:
        published=local(PUBLISHED),
    output:
        report(
            f"{RESULTS}/errata.md",
            caption="../report/errata.rst",
            category="Errata",
            labels={"format": "Markdown"},
        ),
    log:
        f"{RESULTS}/logs/errata.log",
    benchmark:
        f"{RESULTS}/benchmarks/errata.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code_of("report.errata"),
    shell:
        "obr errata --published {input.published} --out {output} >{log} 2>&1"
