# With `keep: scores` the weights go once they are evaluated; the manifest and the report of the layers stay.
kept = temp if config["keep"] == "scores" else lambda output: output


rule compress:
    input:
        unpack(jobs.compression),
        model=jobs.path("model"),
        checked=ancient(jobs.path("model_check")),
    output:
        checkpoint=kept(directory(jobs.path("checkpoint"))),
        manifest=jobs.path("manifest"),
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
        recipe=jobs.weights,
        model=subpath(input.model, parent=True),
        inputs=jobs.input_flags,
        compute=jobs.compute,
        code=jobs.code("compression.stage"),
    message:
        "Compressing {wildcards.model}, {wildcards.recipe}"
    shell:
        "obr compress --recipe {params.recipe} --model {params.model} {params.inputs} --out {output.checkpoint} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} >{log} 2>&1 && "
        "cp {output.checkpoint}/manifest.json {output.manifest} && cp {output.checkpoint}/layers.csv {output.layers}"


rule released:
    input:
        model=jobs.path("model"),
        released=jobs.path("released"),
    output:
        checkpoint=kept(directory(jobs.path("checkpoint"))),
        manifest=jobs.path("manifest"),
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
        recipe=jobs.weights,
        model=subpath(input.model, parent=True),
        released=subpath(input.released, parent=True),
        trust=jobs.trust,
        local=jobs.local("recipes"),
        code=jobs.code("checkpoints.released.stage"),
    message:
        "Verifying the authors' checkpoint {wildcards.recipe} of {wildcards.model}"
    shell:
        "obr released --recipe {params.recipe} --model {params.model} --released {params.released} "
        "--out {output.checkpoint} {params.trust} >{log} 2>&1 && "
        "cp {output.checkpoint}/manifest.json {output.manifest} && cp {output.checkpoint}/layers.csv {output.layers}"
