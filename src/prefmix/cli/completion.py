"""Shell completion: `eval "$(prefmix --print_completion bash)"`."""

from __future__ import annotations

from prefmix.cli.main import VERBS, verb_parser

_BASH = """_prefmix() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then words="{verbs}"; else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  if [[ "$word" == -* || "$COMP_CWORD" -eq 1 ]]; then COMPREPLY=($(compgen -W "$words" -- "$word"))
  else COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _prefmix prefmix"""


def completion_script(shell: str) -> str:
    """The completion script of a shell: bash, zsh or fish.

    Raises:
        ValueError: for another shell.
    """
    if shell == "bash":
        return _bash()
    if shell == "zsh":
        return "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + _bash()
    if shell == "fish":
        return _fish()
    raise ValueError(f"--print_completion {shell}: unknown shell; one of bash, zsh, fish")


def _flags(verb: str) -> list[str]:
    return [flag for action in verb_parser(verb)._actions for flag in action.option_strings if flag.startswith("--")]


def _bash() -> str:
    cases = "\n".join(f'      {verb}) words="{" ".join(_flags(verb))}" ;;' for verb in VERBS)
    return _BASH.format(verbs=" ".join(VERBS), cases=cases)


def _fish() -> str:
    lines = [f"complete -c prefmix -n __fish_use_subcommand -f -a {verb} -d '{line}'" for verb, line in VERBS.items()]
    for verb in VERBS:
        lines += [f"complete -c prefmix -n '__fish_seen_subcommand_from {verb}' -l {flag[2:]}" for flag in _flags(verb)]
    return "\n".join(lines)
