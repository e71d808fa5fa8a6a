rule sensitivity:
    input:
        unpack(jobs.statistics),
        model=jobs.path("model"),
        checked=ancient(jobs.path("model_check")),
        hessians=jobs.path("hessians"),
        gradients=jobs.path("gradients"),
    output:
        jobs.path("sensitivity"),
    log:
        jobs.log("sensitivity", "model", "rotation", "calibration", "options"),
    benchmark:
        jobs.benchmark("sensitivity", "model", "rotation", "calibration", "options")
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["compress"]
    resources:
        mem_mb=jobs.memory(4, 3),
        runtime=jobs.minutes(120, 80),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        settings=jobs.sensitivity_entry,
        model=subpath(input.model, parent=True),
        rotation=jobs.flag("rotation"),
        hessians=subpath(input.hessians, parent=True),
        out=subpath(output[0], parent=True),
        compute=jobs.compute,
        code=jobs.code("mixed_precision.sensitivity"),
    message:
        "Measuring the sensitivity of {wildcards.model} to {wildcards.options}"
    shell:
        "obr sensitivity --settings {params.settings} --model {params.model} {params.rotation} --tokens {input.tokens} "
        "--hessians {params.hessians} --gradients {input.gradients} --out {params.out} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} >{log} 2>&1"


rule allocate:
    input:
        sensitivity=jobs.sensitivity,
    output:
        jobs.path("allocation"),
    log:
        jobs.log("allocate", "model", "recipe"),
    benchmark:
        jobs.benchmark("allocate", "model", "recipe")
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        recipe=jobs.weights,
        code=jobs.code("mixed_precision.allocate"),
    message:
        "Allocating bits for {wildcards.model}, {wildcards.recipe}"
    shell:
        "obr allocate --recipe {params.recipe} --sensitivity {input.sensitivity} --out {output} >{log} 2>&1"
