"""The small files of a model folder that belong to its weights: one list for download, checkpoint, export and push.

Whatever the tokenizer and `generate` of transformers read is on it, and the licence. What only images or audio need
(preprocessor_config.json) is not: the models here read text alone.
"""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

GENERATION = "generation_config.json"
# A pattern matches names in the folder it names: the model's own, or `additional_chat_templates` in it.
SIDE_FILES = (
    # tokenizers: of the library tokenizers, SentencePiece, tiktoken, tekken, BPE and WordPiece as text files
    "tokenizer*.json", "tokenizer.model", "tokenizer.model.v*", "*.tiktoken", "tiktoken.model", "tekken.json",
    "spiece.model", "spm.model", "*sentencepiece*.model", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    GENERATION,
    "LICENSE*", "LICENCE*", "License*", "license*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def is_side_file(name: str) -> bool:
    """Whether a file, named from the model's folder on with `/` between folders, is on the list."""
    parts = PurePosixPath(name).parts
    return any(_matches(parts, PurePosixPath(pattern).parts) for pattern in SIDE_FILES)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


def files_of(folder: Path) -> list[str]:
    """Names of all files in a folder and in the folders inside it, sorted, with `/` between folders."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def side_files(folder: Path) -> list[str]:
    """Names of the side files that a model folder or checkpoint has, sorted."""
    folders = {Path(folder) / PurePosixPath(pattern).parent for pattern in SIDE_FILES}
    present = [path for inside in folders if inside.is_dir() for path in inside.iterdir() if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in present]
    return sorted(name for name in names if is_side_file(name))


def copy_side_files(origin: Path, target: Path) -> None:
    """Copy the side files of the folder `origin` into the folder `target`, as they are."""
    for name in side_files(origin):
        path = Path(target) / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy2(Path(origin) / name, path)
