rule download_model:
    output:
        config=jobs.path("model_config"),
        source=jobs.path("model"),
    log:
        jobs.log("download_model", "model"),
    benchmark:
        jobs.benchmark("download_model", "model")
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=jobs.memory(2, 5),
        runtime=jobs.minutes(30, 5),
    params:
        settings=jobs.model_source,
        out=subpath(output.source, parent=True),
        local=jobs.local("models"),
        code=jobs.code("models.download"),
    message:
        "Downloading {wildcards.model}"
    shell:
        "obr download-model --settings {params.settings} --out {params.out} --rerun >{log} 2>&1"


rule check_model:
    input:
        jobs.path("model_config"),
    output:
        jobs.path("model_check"),
    log:
        jobs.log("check_model", "model"),
    benchmark:
        jobs.benchmark("check_model", "model")
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
    params:
        model=subpath(input[0], parent=True),
        patterns=jobs.patterns,
    message:
        "Checking the sizes of {wildcards.model}"
    shell:
        "obr check-model {params.patterns} --model {params.model} --out {output} >{log} 2>&1"


rule download_text:
    output:
        text=jobs.path("text"),
        about=jobs.path("text_source"),
    log:
        jobs.log("download_text", "text"),
    benchmark:
        jobs.benchmark("download_text", "text")
    wildcard_constraints:
        text=jobs.entries("texts"),
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=jobs.text_entry,
        local=jobs.local("texts"),
        code=jobs.code("data.texts"),
    message:
        "Downloading the text {wildcards.text}"
    shell:
        "obr download-text --settings {params.settings} --out {output.text} >{log} 2>&1"


rule download_documents:
    output:
        documents=jobs.path("documents"),
        about=jobs.path("documents_source"),
    log:
        jobs.log("download_documents", "text"),
    benchmark:
        jobs.benchmark("download_documents", "text")
    wildcard_constraints:
        text=jobs.entries("texts"),
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=jobs.text_entry,
        local=jobs.local("texts"),
        code=jobs.code("data.texts"),
    message:
        "Downloading the documents of {wildcards.text}"
    shell:
        "obr download-documents --settings {params.settings} --out {output.documents} >{log} 2>&1"


rule download_task:
    input:
        unpack(jobs.task_text),
    output:
        jobs.path("task"),
    log:
        jobs.log("download_task", "task"),
    benchmark:
        jobs.benchmark("download_task", "task")
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=jobs.task_source,
        text=jobs.flag("text"),
        out=subpath(output[0], parent=True),
        local=jobs.local("zero_shot"),
        code=jobs.code("evaluation.tasks"),
    message:
        "Downloading the task {wildcards.task}"
    shell:
        "obr download-task --settings {params.settings} {params.text} --out {params.out} --rerun >{log} 2>&1"


rule download_released:
    output:
        jobs.path("released"),
    log:
        jobs.log("download_released", "model", "recipe"),
    benchmark:
        jobs.benchmark("download_released", "model", "recipe")
    wildcard_constraints:
        recipe=jobs.recipes(released=True),
    retries: 1
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=jobs.minutes(30, 10),
    params:
        settings=jobs.released_source,
        out=subpath(output[0], parent=True),
        local=jobs.local("recipes"),
        code=jobs.code("checkpoints.released.stage"),
    message:
        "Downloading the authors' checkpoint {wildcards.recipe} of {wildcards.model}"
    shell:
        "obr download-released --settings {params.settings} --out {params.out} --rerun >{log} 2>&1"
