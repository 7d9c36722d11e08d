"""Encode a gallery, chunked top-k, ITM re-ranking, and the two-stage evaluation made of them.

Shape suffixes: Q queries, G gallery items, C queries of a chunk, k candidates of a query, N (text, image) pairs,
E shared space. Tokens: L of a text, P of an image, S of all texts end to end; D and H are their widths.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from agatool import console
from agatool.config import EvalConfig
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.data.prepare import Prepared
from agatool.errors import CheckpointError, DataError
from agatool.files import contained
from agatool.metrics import QueryMetrics, join_metrics, rank_metrics, summarise
from agatool.model import Encoded, PersonSearchModel, evaluating
from agatool.tokenization import Tokenizer
