rule kernel_benchmark:
    output:
        report(
            f"{RESULTS}/kernels/{{device}}.csv",
            caption="../report/kernels.rst",
            category="Kernels",
        ),
    log:
        f"{RESULTS}/logs/kernel_benchmark/{{device}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/kernel_benchmark/{{device}}.tsv"
    wildcard_constraints:
        device="cpu|cuda",
    conda:
        "../../envs/obr.yaml"
    threads: 1024  # all there are: alone on the machine, or the times mean nothing
    resources:
        mem_mb=8000,
        runtime=60,
        gpu=lambda wildcards: GPU * (wildcards.device == "cuda"),
    params:
        entry=kernel_entry,
        on=kernel_device,
        code=code_of("kernels.benchmark"),
    shell:
        "obr kernels --entry {params.entry:q} --out {output} {params.on} --threads {threads} >{log} 2>&1"
