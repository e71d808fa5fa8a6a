rule download_model:
    output:
        config=f"{RESULTS}/models/{{model}}/config.json",
        source=f"{RESULTS}/models/{{model}}/source.json",
    log:
        f"{RESULTS}/logs/download_model/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_model/{{model}}.tsv"
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=memory(2, 5),
        runtime=minutes(30, 5),
    params:
        entry=entry_of("models"),
        out=subpath(output.source, parent=True),
        local=local_of("models"),
        code=code_of("models.download"),
    shell:
        "obr download-model --entry {params.entry:q} --out {params.out} >{log} 2>&1"


# Cheap, and before anything long: a pattern that does not divide a layer's width stops here.
rule check_model:
    input:
        f"{RESULTS}/models/{{model}}/config.json",
    output:
        f"{RESULTS}/models/{{model}}.checked.json",
    log:
        f"{RESULTS}/logs/check_model/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/check_model/{{model}}.tsv"
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
    params:
        model=subpath(input[0], parent=True),
        # Taking `input` keeps it from starting this job anew: Snakemake would then overlook what else has changed behind
        # it. Patterns that change later are held against the model when the workflow is read.
        entry=lambda wildcards, input: json.dumps(CONFIG.patterns_of(wildcards.model), sort_keys=True),
    shell:
        "obr check-model --entry {params.entry:q} --model {params.model} --out {output} >{log} 2>&1"


rule download_text:
    output:
        text=f"{RESULTS}/texts/{{text}}.txt",
        about=f"{RESULTS}/texts/{{text}}.json",
    log:
        f"{RESULTS}/logs/download_text/{{text}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_text/{{text}}.tsv"
    wildcard_constraints:
        text=one_of(config["texts"]),
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        entry=lambda wildcards: json.dumps(config["texts"][wildcards.text], sort_keys=True),
        local=local_of("texts"),
        code=code_of("data.texts"),
    shell:
        "obr download-text --entry {params.entry:q} --out {output.text} >{log} 2>&1"


# The same texts with their rows apart, for calibrations with `sampling: documents`.
rule download_documents:
    output:
        documents=f"{RESULTS}/documents/{{text}}.jsonl",
        about=f"{RESULTS}/documents/{{text}}.json",
    log:
        f"{RESULTS}/logs/download_documents/{{text}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_documents/{{text}}.tsv"
    wildcard_constraints:
        text=one_of(config["texts"]),
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        entry=lambda wildcards: json.dumps(config["texts"][wildcards.text], sort_keys=True),
        local=local_of("texts"),
        code=code_of("data.texts"),
    shell:
        "obr download-documents --entry {params.entry:q} --out {output.documents} >{log} 2>&1"


rule download_task:
    input:
        unpack(task_text),
    output:
        f"{RESULTS}/tasks/{{task}}/task.json",
    log:
        f"{RESULTS}/logs/download_task/{{task}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_task/{{task}}.tsv"
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        entry=task_source,
        text=task_text_flag,
        out=subpath(output[0], parent=True),
        local=local_of("zero_shot"),
        code=code_of("evaluation.tasks"),
    shell:
        "obr download-task --entry {params.entry:q} {params.text} --out {params.out} >{log} 2>&1"


rule download_rotation:
    input:
        f"{RESULTS}/models/{{model}}/config.json",
    output:
        f"{RESULTS}/rotations/{{rotation}}/{{model}}.safetensors",
    log:
        f"{RESULTS}/logs/download_rotation/{{rotation}}/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_rotation/{{rotation}}/{{model}}.tsv"
    wildcard_constraints:
        rotation=GIVEN,
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        entry=entry_of("rotations"),
        model=subpath(input[0], parent=True),
        trust=trust_of,
        local=local_of("rotations"),
        code=code_of("rotations.obtain"),
    shell:
        "obr download-rotation --entry {params.entry:q} --model {params.model} --out {output} {params.trust} "
        ">{log} 2>&1"


# Rotations with a `learn` are learned instead of drawn or downloaded.
rule learn_rotation:
    input:
        model=f"{RESULTS}/models/{{model}}/source.json",
        tokens=learning_tokens,
    output:
        rotation=f"{RESULTS}/rotations/{{rotation}}/{{model}}.safetensors",
        curve=f"{RESULTS}/rotations/{{rotation}}/{{model}}.csv",
    log:
        f"{RESULTS}/logs/learn_rotation/{{rotation}}/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/learn_rotation/{{rotation}}/{{model}}.tsv"
    wildcard_constraints:
        rotation=LEARNED,
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["learn"]
    resources:
        mem_mb=memory(8, 12),
        runtime=minutes(240, 60),
        gpu=GPU,
    params:
        entry=entry_of("rotations"),
        model=subpath(input.model, parent=True),
        compute=compute_of,
        code=learner_of,
    shell:
        "obr learn-rotation --entry {params.entry:q} --model {params.model} --tokens {input.tokens} "
        "--out {output.rotation} {params.compute} --threads {threads} >{log} 2>&1"


rule calibrate:
    input:
        model=f"{RESULTS}/models/{{model}}/source.json",
        text=calibration_text,
    output:
        f"{RESULTS}/calibration/{{calibration}}/{{model}}.safetensors",
    log:
        f"{RESULTS}/logs/calibrate/{{calibration}}/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/calibrate/{{calibration}}/{{model}}.tsv"
    wildcard_constraints:
        calibration=CUT,
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        entry=entry_of("calibrations"),
        model=subpath(input.model, parent=True),
        trust=trust_of,
        code=code_of("data.token_windows"),
    shell:
        "obr calibrate --entry {params.entry:q} --model {params.model} --text {input.text} --out {output} "
        "{params.trust} >{log} 2>&1"


rule generate:
    input:
        f"{RESULTS}/models/{{model}}/source.json",
    output:
        f"{RESULTS}/calibration/{{calibration}}/{{model}}.safetensors",
    log:
        f"{RESULTS}/logs/generate/{{calibration}}/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/generate/{{calibration}}/{{model}}.tsv"
    wildcard_constraints:
        calibration=GENERATED,
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=memory(4, 6),
        runtime=minutes(60, 60),
        gpu=GPU,
    params:
        entry=entry_of("calibrations"),
        model=subpath(input[0], parent=True),
        compute=compute_of,
        code=code_of("data.self_generated"),
    shell:
        "obr generate --entry {params.entry:q} --model {params.model} --out {output} {params.compute} "
        "--threads {threads} >{log} 2>&1"


rule mix:
    input:
        lambda wildcards: [
            f"{RESULTS}/calibration/{part}/{wildcards.model}.safetensors"
            for part in config["calibrations"][wildcards.calibration]["mix"]
        ],
    output:
        f"{RESULTS}/calibration/{{calibration}}/{{model}}.safetensors",
    log:
        f"{RESULTS}/logs/mix/{{calibration}}/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/mix/{{calibration}}/{{model}}.tsv"
    wildcard_constraints:
        calibration=MIXED,
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        entry=entry_of("calibrations"),
        code=code_of("data.self_generated"),
    shell:
        "obr mix --entry {params.entry:q} --windows {input} --out {output} >{log} 2>&1"
