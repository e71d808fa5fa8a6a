rule evaluate:
    input:
        unpack(jobs.scores.inputs),
        checkpoint=jobs.checkpoint,
    output:
        update(jobs.path("evaluation")),  # scores that it holds are not computed again
    log:
        jobs.log("evaluate", "model", "recipe", "activations"),
    benchmark:
        jobs.benchmark("evaluate", "model", "recipe", "activations")
    priority: 1  # before the next compression, so that few weights wait where `keep` lets them go
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=jobs.memory(4, 3),
        runtime=jobs.minutes(120, 20),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        scores=jobs.scores.entry,
        flags=jobs.scores.flags,
        recipe=jobs.evaluation,
        compute=jobs.compute,
        code=jobs.code("evaluation.stage"),
    message:
        "Evaluating {wildcards.model}, {wildcards.recipe}, {wildcards.activations}"
    shell:
        "obr evaluate {input.checkpoint} {params.flags} --recipe {params.recipe} --out {output} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} --code {params.code} "
        ">{log} 2>&1"
