"""Infrastructure that is independent of the method: flags and errors, several processes, devices, records of a run.

In: a command line, an environment, devices. Out: errors a user can act on, a mesh, metrics, progress, provenance.
"""
