"""Where each thing lives and who talks to whom; the only room that imports ``torch.distributed``."""
