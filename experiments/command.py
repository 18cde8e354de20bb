"""How a driver's command line begins and ends: help, one line about what is wrong, exit codes."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

BAD_INPUT = 2
HELP = {f"{dash}{word}" for dash in ("-", "--") for word in ("h", "help", "helpshort", "helpfull")}


def complain(message: str, program: str = "experiments.run") -> None:
    """One line on standard error, in one piece: other threads write there as well."""
    sys.stderr.write(f"{program}: {' '.join(message.split())}\n")
    sys.stderr.flush()


def helped(argv: Sequence[str], about: str | None, values: flags.FlagValues) -> bool:
    """Prints what a driver is and its flags, if that is what the command line asks for."""
    if not HELP & set(argv[1:]):
        return False
    own = values.flags_by_module_dict().get(sys.argv[0], []) if values is flags.FLAGS else [
        values[name] for name in values
    ]  # fmt: skip
    lines = [(about or "").strip(), "", "Flags:"]
    for one in sorted(own, key=lambda flag: str(flag.name)):
        shown = one.default_as_str.strip("'") if one.default_as_str else "none"
        lines.append(f"  --{one.name}={shown}: {one.help}")
    print("\n".join(lines))
    return True


def end(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Ends the process with what a driver's `main` returns, None for 0.

    Where nobody reads any more what it prints (`| head`), it ends in silence, with the code that a
    shell gives to a closed pipe.
    """
    try:
        code = main(list(sys.argv if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def end_with_flags(main: Callable[[list[str]], Any]) -> None:
    """`end`, of a driver with flags of absl's `FLAGS`: parses them first."""
    about = sys.modules["__main__"]
    if helped(sys.argv, about.__doc__, flags.FLAGS):
        sys.exit(0)
    try:
        words = flags.FLAGS(sys.argv)
    except flags.Error as error:
        complain(str(error), about.__spec__.name if about.__spec__ else about.__name__)
        sys.exit(BAD_INPUT)
    end(main, words)
