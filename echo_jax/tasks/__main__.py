"""Shows tasks of a family, and checks that its script solves them and that an empty answer does not.

    python -m echo_jax.tasks --task=shell --set level=2
    python -m echo_jax.tasks --task=maze --set width=6 --set height=6 --split=heldout --show=1 --count=100

Out: prompts, tools and files; then how many of `--count` tasks the family's script solves in real episodes, and how
many an agent solves by submitting an empty answer at once.
"""

from absl import flags

from echo_jax.system.cli import run_program
from echo_jax.tasks import FAMILIES


def main(args: flags.FlagValues) -> None:
    # This takes seconds to import, which --help and a misspelt flag need not wait for.
    from echo_jax.run.task_check import check, make_family, show

    family = make_family(args.task, args.set)
    for index in range(args.show):
        show(family.make(args.split, index))
    check([family.make(args.split, index) for index in range(args.count)])


if __name__ == "__main__":
    flags.DEFINE_string("task", None, f"The family: {', '.join(FAMILIES)}.")
    flags.DEFINE_multi_string(
        "set", [], "A parameter, such as level=2; may be repeated. The others are as in config.py."
    )
    flags.DEFINE_enum("split", "train", ["train", "heldout"], "The split to take tasks from.")
    flags.DEFINE_integer("show", 3, "Number of tasks to show.", lower_bound=0)
    flags.DEFINE_integer("count", 20, "Number of tasks to run.", lower_bound=1)
    run_program(main, required=("task",))
