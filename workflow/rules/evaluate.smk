rule perplexity:
    input:
        checkpoint=jobs.checkpoint,
        text=jobs.evaluated_text,
    output:
        jobs.path("perplexity"),
    log:
        jobs.log("perplexity", "model", "recipe", "activations", "text"),
    benchmark:
        jobs.benchmark("perplexity", "model", "recipe", "activations", "text")
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=jobs.memory(4, 3),
        runtime=jobs.minutes(60, 5),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        entry=jobs.entry("perplexity"),
        recipe=jobs.evaluation,
        checkpoint=subpath(input.checkpoint, parent=True),
        compute=jobs.compute,
        code=jobs.code("evaluation.perplexity"),
    shell:
        "obr perplexity --entry {params.entry:q} --checkpoint {params.checkpoint} --recipe {params.recipe:q} "
        "--text {input.text} --out {output} --activations-memory {resources.activations_mb} {params.compute} "
        "--threads {threads} >{log} 2>&1"


rule zero_shot:
    input:
        checkpoint=jobs.checkpoint,
        task=jobs.path("task"),
    output:
        jobs.path("zero_shot"),
    log:
        jobs.log("zero_shot", "model", "recipe", "activations", "task"),
    benchmark:
        jobs.benchmark("zero_shot", "model", "recipe", "activations", "task")
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=jobs.memory(4, 3),
        runtime=jobs.minutes(120, 15),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        entry=jobs.entry("zero_shot"),
        recipe=jobs.evaluation,
        checkpoint=subpath(input.checkpoint, parent=True),
        task=subpath(input.task, parent=True),
        compute=jobs.compute,
        code=jobs.code("evaluation.zero_shot"),
    shell:
        "obr zero-shot --entry {params.entry:q} --checkpoint {params.checkpoint} --recipe {params.recipe:q} "
        "--task {params.task} --out {output} --activations-memory {resources.activations_mb} {params.compute} "
        "--threads {threads} >{log} 2>&1"
