"""The console script `hf-iai`. It is installed as a package of its own, `hf_iai_launcher`, outside `hf_iai`.

`import hf_iai` takes seconds, because it registers the method with PEFT. A script that starts at `hf_iai.cli:app` would
wait for it even to print `--help`. This one loads the file `hf_iai/cli.py` alone, which needs nothing but typer.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Run the command line of the `hf_iai` that `import hf_iai` would load."""
    package = find_spec("hf_iai")  # finds the package without importing it
    spec = spec_from_file_location("hf_iai_cli", Path(package.origin).with_name("cli.py"))
    cli = module_from_spec(spec)
    spec.loader.exec_module(cli)
    cli.app()
