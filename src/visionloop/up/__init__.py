"""`visionloop up`: the whole stack on one machine without docker, as processes that are watched.

supervise   starts the parts, asks how they are, starts one again that has ended, stops all together
parts       what is started: home page, MLflow, Prefect, the prediction server, the runner of the deployments
board       what a supervisor tells others: .visionloop/up/state.json, its lock, and the ports that are kept
overview    the state of the loop, read from the store and from Prefect
home        the page that shows it, a process of its own
"""
