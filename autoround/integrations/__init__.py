# SPDX-License-Identifier: Apache-2.0
"""How other projects' loaders reach our kernels."""
