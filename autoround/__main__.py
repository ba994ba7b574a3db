# SPDX-License-Identifier: Apache-2.0
"""`python -m autoround` is the `autoround` command."""

from autoround.cli import main

main()
