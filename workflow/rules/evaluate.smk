rule perplexity:
    input:
        checkpoint=checkpoint_manifest,
        text=lambda wildcards: f"{RESULTS}/texts/{config['perplexity'][wildcards.text]['text']}.txt",
    output:
        f"{RESULTS}/perplexity/{{model}}/{{recipe}}/{{text}}.json",
    log:
        f"{RESULTS}/logs/perplexity/{{model}}/{{recipe}}/{{text}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/perplexity/{{model}}/{{recipe}}/{{text}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=memory(4, 3),
        runtime=minutes(60, 5),
        gpu=GPU,
        activations_mb=config["activations_memory"],
    params:
        entry=entry_of("perplexity"),
        recipe=lambda wildcards: CONFIG.evaluation_entry(wildcards.recipe),
        checkpoint=subpath(input.checkpoint, parent=True),
        compute=compute_of,
        code=code_of("evaluation.perplexity"),
    shell:
        "obr perplexity --entry {params.entry:q} --checkpoint {params.checkpoint} --recipe {params.recipe:q} "
        "--text {input.text} --out {output} --activations-memory {resources.activations_mb} {params.compute} "
        "--threads {threads} >{log} 2>&1"


rule zero_shot:
    input:
        checkpoint=checkpoint_manifest,
        task=f"{RESULTS}/tasks/{{task}}/task.json",
    output:
        f"{RESULTS}/zero_shot/{{model}}/{{recipe}}/{{task}}.json",
    log:
        f"{RESULTS}/logs/zero_shot/{{model}}/{{recipe}}/{{task}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/zero_shot/{{model}}/{{recipe}}/{{task}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=memory(6, 3),
        runtime=minutes(120, 30),
        gpu=GPU,
    params:
        entry=entry_of("zero_shot"),
        recipe=lambda wildcards: CONFIG.evaluation_entry(wildcards.recipe),
        checkpoint=subpath(input.checkpoint, parent=True),
        task=subpath(input.task, parent=True),
        compute=compute_of,
        code=[code_of("evaluation.zero_shot"), code_of("checkpoints.format")],
    shell:
        "obr zero-shot --entry {params.entry:q} --checkpoint {params.checkpoint} --recipe {params.recipe:q} "
        "--task {params.task} --out {output} {params.compute} --threads {threads} >{log} 2>&1"
