rule calibrate:
    input:
        model=jobs.path("model"),
        text=jobs.calibration_text,
    output:
        jobs.path("calibration"),
    log:
        jobs.log("calibrate", "calibration", "model"),
    benchmark:
        jobs.benchmark("calibrate", "calibration", "model")
    wildcard_constraints:
        calibration=jobs.entries("calibrations", "text"),
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=jobs.entry("calibrations"),
        model=subpath(input.model, parent=True),
        trust=jobs.trust,
        code=jobs.code("data.token_windows"),
    message:
        "Choosing windows of {wildcards.calibration} for {wildcards.model}"
    shell:
        "obr calibrate --settings {params.settings} --model {params.model} --text {input.text} --out {output} "
        "{params.trust} >{log} 2>&1"


rule generate:
    input:
        jobs.path("model"),
    output:
        jobs.path("calibration"),
    log:
        jobs.log("generate", "calibration", "model"),
    benchmark:
        jobs.benchmark("generate", "calibration", "model")
    wildcard_constraints:
        calibration=jobs.entries("calibrations", "generated"),
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["evaluate"]
    resources:
        mem_mb=jobs.memory(4, 6),
        runtime=jobs.minutes(60, 60),
        gpu=jobs.gpu,
    params:
        settings=jobs.entry("calibrations"),
        model=subpath(input[0], parent=True),
        compute=jobs.compute,
        code=jobs.code("data.self_generated"),
    message:
        "Letting {wildcards.model} write {wildcards.calibration}"
    shell:
        "obr generate --settings {params.settings} --model {params.model} --out {output} {params.compute} "
        "--threads {threads} >{log} 2>&1"


rule mix:
    input:
        jobs.mixed,
    output:
        jobs.path("calibration"),
    log:
        jobs.log("mix", "calibration", "model"),
    benchmark:
        jobs.benchmark("mix", "calibration", "model")
    wildcard_constraints:
        calibration=jobs.entries("calibrations", "mix"),
    conda:
        "../../envs/obr.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        settings=jobs.entry("calibrations"),
        code=jobs.code("data.self_generated"),
    message:
        "Mixing windows of {wildcards.calibration} for {wildcards.model}"
    shell:
        "obr mix --settings {params.settings} --windows {input} --out {output} >{log} 2>&1"


rule hessian:
    input:
        unpack(jobs.statistics),
        model=jobs.path("model"),
        checked=ancient(jobs.path("model_check")),
    output:
        jobs.path("hessians"),
    log:
        jobs.log("hessian", "model", "rotation", "calibration"),
    benchmark:
        jobs.benchmark("hessian", "model", "rotation", "calibration")
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["hessian"]
    resources:
        mem_mb=jobs.memory(4, 3),
        runtime=jobs.minutes(60, 15),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        model=subpath(input.model, parent=True),
        rotation=jobs.flag("rotation"),
        out=subpath(output[0], parent=True),
        compute=jobs.compute,
        code=jobs.code("calibration.collect_hessians"),
    message:
        "Collecting Hessians of {wildcards.model}, {wildcards.rotation}, {wildcards.calibration}"
    shell:
        "obr hessian --model {params.model} {params.rotation} --tokens {input.tokens} --out {params.out} "
        "--activations-memory {resources.activations_mb} {params.compute} --threads {threads} >{log} 2>&1"


rule gradients:
    input:
        unpack(jobs.statistics),
        model=jobs.path("model"),
    output:
        jobs.path("gradients"),
    log:
        jobs.log("gradients", "model", "rotation", "calibration"),
    benchmark:
        jobs.benchmark("gradients", "model", "rotation", "calibration")
    conda:
        "../../envs/obr.yaml"
    threads: config["threads"]["hessian"]
    resources:
        mem_mb=jobs.memory(5, 2),
        runtime=jobs.minutes(30, 10),
        gpu=jobs.gpu,
        activations_mb=config["activations_memory"],
    params:
        settings=jobs.gradients_entry,
        model=subpath(input.model, parent=True),
        rotation=jobs.flag("rotation"),
        compute=jobs.compute,
        code=jobs.code("calibration.output_gradients"),
    message:
        "Measuring output gradients of {wildcards.model}, {wildcards.rotation}, {wildcards.calibration}"
    shell:
        "obr gradients --settings {params.settings} --model {params.model} {params.rotation} --tokens {input.tokens} "
        "--out {output} --activations-memory {resources.activations_mb} {params.compute} --threads {threads} "
        ">{log} 2>&1"
