"""Twenty functions written for these tests, none from a public repository, each with a hole: (prefix, suffix)."""

from __future__ import annotations

FUNCTIONS = """\
def reverse_words(sentence):
    words = sentence.split()
    <?>
    return ' '.join(words)
----
def count_vowels(text):
    total = 0
    for letter in text:
        if <?>:
            total += 1
    return total
----
def is_leap_year(year):
    return <?>


assert is_leap_year(2000)
assert not is_leap_year(1900)
----
def clamp(value, low, high):
    if value < low:
        return low
    <?>
    return value
----
def running_mean(values):
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value
        <?>
    return means
----
import json


def read_settings(path):
    with open(path) as file:
        <?>
    return settings
----
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        <?>

    def pop(self):
        return self.items.pop()
----
def gcd(a, b):
    while b:
        <?>
    return a
----
def matrix_multiply(a, b):
    rows, inner, columns = len(a), len(b), len(b[0])
    result = [[0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            for k in range(inner):
                <?>
    return result
----
def word_lengths(words):
    return {<?>}


print(word_lengths(['a', 'bee']))
----
function debounce(callback, delay) {
  let timer = null;
  return (...args) => {
    <?>
    timer = setTimeout(() => callback(...args), delay);
  };
}
----
fn largest(numbers: &[i32]) -> i32 {
    let mut best = numbers[0];
    for &number in numbers {
        <?>
    }
    best
}
----
int sum_digits(int number) {
    int sum = 0;
    while (number > 0) {
        <?>
        number /= 10;
    }
    return sum;
}
----
SELECT customer, SUM(amount) AS total
FROM orders
<?>
ORDER BY total DESC;
----
func contains(items []string, wanted string) bool {
	for _, item := range items {
		<?>
	}
	return false
}
----
def to_snake_case(name):
    result = ''
    for letter in name:
        if letter.isupper():
            <?>
        else:
            result += letter
    return result.lstrip('_')
----
def celsius_to_fahrenheit(degrees):
    <?>


assert celsius_to_fahrenheit(100) == 212
----
def flatten(lists):
    flat = []
    for inner in lists:
        <?>
    return flat
----
# Zählt, wie oft ein Wort vorkommt.
def häufigkeit(wörter):
    zähler = {}
    for wort in wörter:
        <?>
    return zähler
----
def bubble_sort(values):
    n = len(values)
    for i in range(n):
        for j in range(n - 1 - i):
            if values[j] > values[j + 1]:
                <?>
    return values
"""
HOLES = [(prefix, suffix) for prefix, _, suffix in (text.partition("<?>") for text in FUNCTIONS.split("----\n"))]
