rule compress:
    input:
        unpack(jobs.compression),
        model=jobs.path("model"),
        checked=ancient(jobs.path("model_check")),
    output:
        manifest=jobs.path("checkpoint"),
        layers=report(
            jobs.path("layers"),
            caption="../report/layers.rst",
            category="Layers",
            labels={"model": "{model}", "recipe": "{recipe}"},
        ),
    log:
        jobs.log("compress", "model", "recipe"),
    benchmark:
        jobs.benchmark("compress", "model", "recipe")
    wildcard_constraints:
        recipe=jobs.recipes(released=False),
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["compress"]
    resources:
        mem_mb=jobs.memory(4, 3),
        runtime=jobs.minutes(120, 40),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        entry=jobs.weights,
        model=subpath(input.model, parent=True),
        inputs=jobs.input_flags,
        out=subpath(output.manifest, parent=True),
        compute=jobs.compute,
        code=jobs.code("compression.stage"),
    shell:
        "obr compress --entry {params.entry:q} --model {params.model} {params.inputs} --out {params.out} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} >{log} 2>&1"


rule released:
    input:
        model=jobs.path("model"),
        released=jobs.path("released"),
    output:
        manifest=jobs.path("checkpoint"),
        layers=jobs.path("layers"),
    log:
        jobs.log("released", "model", "recipe"),
    benchmark:
        jobs.benchmark("released", "model", "recipe")
    wildcard_constraints:
        recipe=jobs.recipes(released=True),
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["compress"]
    resources:
        mem_mb=jobs.memory(4, 3),
        runtime=jobs.minutes(30, 10),
    params:
        entry=jobs.weights,
        model=subpath(input.model, parent=True),
        released=subpath(input.released, parent=True),
        trust=jobs.trust,
        out=subpath(output.manifest, parent=True),
        local=jobs.local("recipes"),
        code=jobs.code("checkpoints.released.stage"),
    shell:
        "obr released --entry {params.entry:q} --model {params.model} --released {params.released} "
        "--out {params.out} {params.trust} >{log} 2>&1"
