"""A command line that cannot be read, said in one line."""

import typer

UsageError = typer.BadParameter.__base__


def usage_line(error: UsageError, program: str) -> str:
    """What is wrong with a program's command line: the option, its value, and what it may be."""
    if type(error) is not typer.BadParameter or error.param is None:
        command = error.ctx.command_path if error.ctx else program
        return f"{error.format_message().rstrip('.')}; {command} -h lists what there is"
    name = error.param.opts[0]
    if not name.startswith("-"):
        name = error.param.metavar or name.upper()
    # Of recent versions of typer, which check by pydantic; older ones repeat the value themselves.
    found = getattr(error.__cause__, "errors", list)()
    if not found or found[0]["type"] == "value_error":
        return f"{name} {error.message.removeprefix('Value error, ')}"
    return f"{name} {found[0]['input']!r} {found[0]['msg'].removeprefix('Input ').partition(',')[0]}"
