"""Who wrote a token. The role is stamped when the token is born and never guessed from text afterwards."""

import enum


class Role(enum.IntEnum):
    """The class of a token, named by its writer; every mask of the objective derives from it. The roles that count as
    the environment come last, from OBSERVATION on."""

    PAD = 0  # filler of a packed row
    PROMPT = 1  # the task, as the environment states it
    SCAFFOLD = 2  # turn markers, generation prompts, closing markers that the harness adds
    ACTION = 3  # sampled by the policy (or written by a demonstrator), stop token included
    OBSERVATION = 4  # the body of a tool's output
    BOILERPLATE = 5  # what a tool's wrapper adds to an output: echoed command, exit status, time-out notice
    TRUNCATION = 6  # the notice in place of the dropped middle of a long output
    FEEDBACK = 7  # the harness's answer to a call it could not parse
    WARNING = 8  # a rule-based remark by the harness, for example that this is the last turn
    USER = 9  # what a user says within the episode; the task itself is PROMPT
    SYSTEM = 10  # a system message within the episode


# |O| of the paper: everything the environment wrote after the prompt, warnings included (arXiv 2605.24517, eq. 3).
# Maps each class's name in configs and metrics to its role; a weight per class decides which are trained (O').
ENVIRONMENT_CLASSES = {
    "body": Role.OBSERVATION,
    "boilerplate": Role.BOILERPLATE,
    "truncation": Role.TRUNCATION,
    "feedback": Role.FEEDBACK,
    "warning": Role.WARNING,
    "user": Role.USER,
    "system": Role.SYSTEM,
}
ENVIRONMENT_ROLES = tuple(ENVIRONMENT_CLASSES.values())

# Who can answer a turn -> the role of the body of the answer. A chat format renders each as a turn of its own kind.
SPEAKERS = {"tool": Role.OBSERVATION, "user": Role.USER, "system": Role.SYSTEM}
BODIES = tuple(SPEAKERS.values())
