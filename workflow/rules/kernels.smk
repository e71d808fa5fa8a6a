rule kernels:
    output:
        report(
            jobs.path("kernels"),
            caption="../report/kernels.rst",
            category="Kernels",
        ),
    log:
        jobs.log("kernels", "device"),
    benchmark:
        jobs.benchmark("kernels", "device")
    wildcard_constraints:
        device="cpu|cuda",
    conda:
        "../../envs/obr.yaml"
    threads: 1024  # all there are: alone on the machine, or the times mean nothing
    resources:
        mem_mb=8000,
        runtime=60,
        gpu=lambda wildcards: jobs.gpu * (wildcards.device == "cuda"),
    params:
        settings=jobs.kernels_entry,
        on=jobs.kernels_device,
        code=jobs.code("kernels.benchmark"),
    message:
        "Timing products on {wildcards.device}"
    shell:
        "obr kernels --settings {params.settings} --out {output} {params.on} --threads {threads} >{log} 2>&1"
