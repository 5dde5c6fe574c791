"""Byte-level byte pair encoding: how GPT-2 and its successors learn a vocabulary from text.

    tokens = train_bpe(count_words(texts, pattern), 8192)

A text is cut into words by a regex, and words are bytes. Training repeats one step: the most
frequent pair of neighbors within words becomes a token. Source: arXiv:1508.07909, and GPT-2.
"""

import heapq
from collections import Counter, defaultdict
from itertools import pairwise

import regex  # tiktoken depends on it, so it is installed

LONGEST_WORD = 1000  # characters; merging takes time in proportion to the length

PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = [bytes([byte]) for byte in PRINTABLE + OTHERS]  # in GPT-2's order


def count_words(texts, pattern):
    """Return how often each word, as bytes, occurs in the texts.

    pattern: the regex whose matches are the words. Words longer than LONGEST_WORD are cut.
    """
    found = Counter()
    for text in texts:
        found.update(regex.findall(pattern, text))

    counts = Counter()
    for word, n in found.items():
        for start in range(0, len(word), LONGEST_WORD):
            part = word[start : start + LONGEST_WORD]
            counts[part.encode()] += n
    return counts


def train_bpe(word_counts, n_tokens):
    """Return a vocabulary: a list of bytes objects, whose places in the list are their ids.

    The first 256 are the single bytes in GPT-2's order. Among equally frequent pairs, the one with
    the lower left id is merged first. If the left ids are equal, the lower right id decides. The
    vocabulary is smaller than n_tokens if no pair is left.

    >>> train_bpe({b"hug": 3, b"pug": 2, b"hugs": 1}, 259)[256:]
    [b'ug', b'hug', b'pug']
    """
    tokens = list(BYTES)
    ids = {token: i for i, token in enumerate(tokens)}
    words = Words(word_counts, ids)
    queue = [(-n, pair) for pair, n in words.pair_counts.items()]
    heapq.heapify(queue)
    while queue and len(tokens) < n_tokens:
        n, pair = heapq.heappop(queue)
        n_now = words.pair_counts[pair]
        if n_now != -n:  # other merges have changed the count since the pair was queued
            if n_now > 0:
                heapq.heappush(queue, (-n_now, pair))
            continue

        left, right = pair
        token = tokens[left] + tokens[right]
        if token not in ids:  # another pair may have made the same bytes before
            ids[token] = len(tokens)
            tokens.append(token)
        for new_pair in words.merge(pair, ids[token]):
            heapq.heappush(queue, (-words.pair_counts[new_pair], new_pair))
    return tokens


class Words:
    """Words as lists of ids, and how often each pair of neighbors occurs in them.

    pair_counts: the number of occurrences of each pair.
    """

    def __init__(self, word_counts, ids):
        self.counts = list(word_counts.values())
        self.words = [[ids[bytes([byte])] for byte in word] for word in word_counts]
        self.pair_counts = Counter()
        self.where = defaultdict(set)  # pair -> indices of words that hold it, or held it once
        for index, word in enumerate(self.words):
            for pair in pairwise(word):
                self.pair_counts[pair] += self.counts[index]
                self.where[pair].add(index)

    def merge(self, pair, token_id):
        """Replace the pair by token_id everywhere, and return the new pairs.

        Only the words that hold the pair are counted again, which makes training fast.
        """
        new_pairs = set()
        for index in self.where.pop(pair):
            count = self.counts[index]
            for old_pair in pairwise(self.words[index]):
                self.pair_counts[old_pair] -= count
            self.words[index] = merge(self.words[index], pair, token_id)
            for now in pairwise(self.words[index]):
                self.pair_counts[now] += count
                if token_id in now:
                    self.where[now].add(index)
                    new_pairs.add(now)
        return new_pairs


def merge(word, pair, token_id):
    """Return a word's ids with each occurrence of the pair, from the left, replaced by token_id.

    >>> merge([7, 7, 7], (7, 7), 9)
    [9, 7]
    """
    merged = []
    i = 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(token_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
