rule download_rotation:
    input:
        jobs.path("model_config"),
    output:
        jobs.path("rotation"),
    log:
        jobs.log("download_rotation", "rotation", "model"),
    benchmark:
        jobs.benchmark("download_rotation", "rotation", "model")
    wildcard_constraints:
        rotation=jobs.entries("rotations", "learn", has=False),
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=jobs.entry("rotations"),
        model=subpath(input[0], parent=True),
        trust=jobs.trust,
        local=jobs.local("rotations"),
        code=jobs.code("rotations.obtain"),
    message:
        "Making the rotation {wildcards.rotation} of {wildcards.model}"
    shell:
        "obr download-rotation --settings {params.settings} --model {params.model} --out {output} {params.trust} "
        ">{log} 2>&1"


rule learn_rotation:
    input:
        model=jobs.path("model"),
        tokens=jobs.learning_tokens,
    output:
        rotation=jobs.path("rotation"),
        curve=jobs.path("learning_curve"),
    log:
        jobs.log("learn_rotation", "rotation", "model"),
    benchmark:
        jobs.benchmark("learn_rotation", "rotation", "model")
    wildcard_constraints:
        rotation=jobs.entries("rotations", "learn"),
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["learn"]
    resources:
        mem_mb=jobs.memory(8, 3),
        runtime=jobs.minutes(240, 60),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        settings=jobs.entry("rotations"),
        model=subpath(input.model, parent=True),
        compute=jobs.compute,
        code=jobs.learner,
    message:
        "Learning the rotation {wildcards.rotation} of {wildcards.model}"
    shell:
        "obr learn-rotation --settings {params.settings} --model {params.model} --tokens {input.tokens} "
        "--out {output.rotation} --activations-memory {resources.activations_mb} {params.compute} --threads {threads} "
        ">{log} 2>&1"
