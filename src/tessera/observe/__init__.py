"""What is happening, and what will it cost: the run's log, its progress bar, its pictures, its report, its estimates.

Nothing in this room influences training. It reads numbers the trainer hands over and files a run leaves behind:

    metrics.RunLog    every number of a run -> logging.jsonl, the console, TensorBoard, wandb
    screen            the one screen printed before the first step
    cost              how much memory and how many FLOPs a step will take (an estimate, and called one)
    plots             images/*.png, one per curve
    report            report.html, one self-contained page about a run
"""
