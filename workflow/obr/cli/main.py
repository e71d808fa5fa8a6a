"""The command `obr`: sub-commands for people and one per stage, which Snakemake runs and people can run by hand."""

import gc
import io
import os
import sys

from obr.cli.parser import parser
from obr.errors import ObrError, printable
from obr.models import remote_code
from obr.runtime import cache_folder
from obr.runtime.gpu import taken_away


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit status. Foreseen problems end in one sentence on stderr and status 1."""
    gc.set_threshold(100_000, 50, 50)  # imports make many objects and no garbage: a fifth of their time
    args = parser().parse_args(argv)
    threads = getattr(args, "threads", None)
    if threads:  # before any library reads them
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(threads)
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without "±" changes what is printed, not whether it is
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if sentence := cache_folder.redirect():
            print(f"obr: {sentence}", file=sys.stderr)
        with remote_code.allowed(getattr(args, "trust_remote_code", False)):
            args.stage(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ObrError as error:
        print(f"obr: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"obr: {error.strerror}{where}; free the space or correct the path, then rerun.", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not (sentence := taken_away(error)):
            raise
        print(f"obr: {printable(sentence)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("obr: interrupted; rerun to continue.", file=sys.stderr)
        return 130
    return 0
