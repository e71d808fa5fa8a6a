rule hessian:
    input:
        unpack(hessian_inputs),
        model=f"{RESULTS}/models/{{model}}/source.json",
        checked=ancient(f"{RESULTS}/models/{{model}}.checked.json"),
    output:
        f"{RESULTS}/hessians/{{model}}/{{rotation}}/{{calibration}}/hessian.json",
    log:
        f"{RESULTS}/logs/hessian/{{model}}/{{rotation}}/{{calibration}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/hessian/{{model}}/{{rotation}}/{{calibration}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["hessian"]
    resources:
        mem_mb=memory(4, 3),
        runtime=minutes(60, 15),
        gpu=GPU,
        activations_mb=config["activations_memory"],
    params:
        model=subpath(input.model, parent=True),
        rotation=rotation_flag,
        out=subpath(output[0], parent=True),
        compute=compute_of,
        code=code_of("calibration.collect_hessians"),
    shell:
        "obr hessian --model {params.model} {params.rotation} --tokens {input.tokens} --out {params.out} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} >{log} 2>&1"


rule gradients:
    input:
        unpack(hessian_inputs),
        model=f"{RESULTS}/models/{{model}}/source.json",
    output:
        f"{RESULTS}/gradients/{{model}}/{{rotation}}/{{calibration}}.safetensors",
    log:
        f"{RESULTS}/logs/gradients/{{model}}/{{rotation}}/{{calibration}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/gradients/{{model}}/{{rotation}}/{{calibration}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["hessian"]
    resources:
        mem_mb=memory(5, 2),
        runtime=minutes(30, 10),
        gpu=GPU,
        activations_mb=config["activations_memory"],
    params:
        entry=json.dumps(config["gradients"], sort_keys=True),
        model=subpath(input.model, parent=True),
        rotation=rotation_flag,
        compute=compute_of,
        code=code_of("calibration.output_gradients"),
    shell:
        "obr gradients --entry {params.entry:q} --model {params.model} {params.rotation} --tokens {input.tokens} "
        "--out {output} --activations-memory {resources.activations_mb} {params.compute} --threads {threads} "
        ">{log} 2>&1"


rule sensitivity:
    input:
        unpack(hessian_inputs),
        model=f"{RESULTS}/models/{{model}}/source.json",
        checked=ancient(f"{RESULTS}/models/{{model}}.checked.json"),
        hessians=f"{RESULTS}/hessians/{{model}}/{{rotation}}/{{calibration}}/hessian.json",
        gradients=f"{RESULTS}/gradients/{{model}}/{{rotation}}/{{calibration}}.safetensors",
    output:
        f"{RESULTS}/sensitivity/{{model}}/{{rotation}}/{{calibration}}/{{options}}/losses.json",
    log:
        f"{RESULTS}/logs/sensitivity/{{model}}/{{rotation}}/{{calibration}}/{{options}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sensitivity/{{model}}/{{rotation}}/{{calibration}}/{{options}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["compress"]
    resources:
        mem_mb=memory(4, 3),
        runtime=minutes(120, 80),
        gpu=GPU,
        activations_mb=config["activations_memory"],
    params:
        entry=sensitivity_entry,
        model=subpath(input.model, parent=True),
        rotation=rotation_flag,
        hessians=subpath(input.hessians, parent=True),
        out=subpath(output[0], parent=True),
        compute=compute_of,
        code=code_of("mixed_precision.sensitivity"),
    shell:
        "obr sensitivity --entry {params.entry:q} --model {params.model} {params.rotation} --tokens {input.tokens} "
        "--hessians {params.hessians} --gradients {input.gradients} --out {params.out} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} >{log} 2>&1"


rule allocate:
    input:
        sensitivity=sensitivity_of,
    output:
        f"{RESULTS}/allocations/{{model}}/{{recipe}}.json",
    log:
        f"{RESULTS}/logs/allocate/{{model}}/{{recipe}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/allocate/{{model}}/{{recipe}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        entry=lambda wildcards: CONFIG.weight_entry(wildcards.recipe),
        code=code_of("mixed_precision.allocate"),
    shell:
        "obr allocate --entry {params.entry:q} --sensitivity {input.sensitivity} --out {output} >{log} 2>&1"


rule compress:
    input:
        unpack(recipe_inputs),
        model=f"{RESULTS}/models/{{model}}/source.json",
        checked=ancient(f"{RESULTS}/models/{{model}}.checked.json"),
    output:
        manifest=f"{RESULTS}/compressed/{{model}}/{{recipe}}/manifest.json",
        layers=report(
            f"{RESULTS}/compressed/{{model}}/{{recipe}}/layers.csv",
            caption="../report/layers.rst",
            category="Layers",
            labels={"model": "{model}", "recipe": "{recipe}"},
        ),
    log:
        f"{RESULTS}/logs/compress/{{model}}/{{recipe}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/compress/{{model}}/{{recipe}}.tsv"
    wildcard_constraints:
        recipe=COMPRESSED,
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["compress"]
    resources:
        mem_mb=memory(4, 3),
        runtime=minutes(120, 40),
        gpu=GPU,
        activations_mb=config["activations_memory"],
    params:
        entry=lambda wildcards: CONFIG.weight_entry(wildcards.recipe),
        model=subpath(input.model, parent=True),
        inputs=recipe_flags,
        out=subpath(output.manifest, parent=True),
        compute=compute_of,
        code=code_of("compression.stage"),
    shell:
        "obr compress --entry {params.entry:q} --model {params.model} {params.inputs} --out {params.out} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} >{log} 2>&1"


rule download_released:
    output:
        f"{RESULTS}/released/{{model}}/{{recipe}}/source.json",
    log:
        f"{RESULTS}/logs/download_released/{{model}}/{{recipe}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_released/{{model}}/{{recipe}}.tsv"
    wildcard_constraints:
        recipe=RELEASED,
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=minutes(30, 10),
    params:
        entry=lambda wildcards: json.dumps(config["recipes"][wildcards.recipe]["source"], sort_keys=True),
        out=subpath(output[0], parent=True),
        local=local_of("recipes"),
        code=code_of("checkpoints.released.stage"),
    shell:
        "obr download-released --entry {params.entry:q} --out {params.out} >{log} 2>&1"


# Recipes of the method `released` are taken over instead of computed.
rule released:
    input:
        model=f"{RESULTS}/models/{{model}}/source.json",
        released=f"{RESULTS}/released/{{model}}/{{recipe}}/source.json",
    output:
        manifest=f"{RESULTS}/compressed/{{model}}/{{recipe}}/manifest.json",
        layers=f"{RESULTS}/compressed/{{model}}/{{recipe}}/layers.csv",
    log:
        f"{RESULTS}/logs/released/{{model}}/{{recipe}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/released/{{model}}/{{recipe}}.tsv"
    wildcard_constraints:
        recipe=RELEASED,
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["compress"]
    resources:
        mem_mb=memory(4, 3),
        runtime=minutes(30, 10),
    params:
        entry=lambda wildcards: CONFIG.weight_entry(wildcards.recipe),
        model=subpath(input.model, parent=True),
        released=subpath(input.released, parent=True),
        trust=trust_of,
        out=subpath(output.manifest, parent=True),
        local=local_of("recipes"),
        code=code_of("checkpoints.released.stage"),
    shell:
        "obr released --entry {params.entry:q} --model {params.model} --released {params.released} "
        "--out {params.out} {params.trust} >{log} 2>&1"
