"""Episodes: an agent acts through tools until it submits or a budget ends it.

In: tasks and a policy. Out: trajectories, each token with the role of its writer, and files of them.
"""
