"""The programs themselves; main.py, ablate.py and diagnose.py run them."""
