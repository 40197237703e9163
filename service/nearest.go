package service

import (
	"fmt"
	"strings"
)

// Nearest suggests the word that was probably meant, or nothing: an end of a sentence
// that says that there is no such word.
func Nearest(word string, words []string) string {
	best := NearestWord(word, words)
	if best == "" {
		return known(words)
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// NearestWord returns the word that was probably meant, or "".
func NearestWord(word string, words []string) string {
	const longest = 64 // no key is nearly as long
	if len(word) > longest {
		return ""
	}
	best, distance := "", 1+len(word)/2
	for _, w := range words {
		if n := editDistance(strings.ToLower(word), strings.ToLower(w)); n < distance {
			best, distance = w, n
		}
	}
	return best
}

// editDistance counts the letters to insert, remove, change or swap with their
// neighbour to turn one word into the other (optimal string alignment).
func editDistance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// known names the words that there are, if there are not too many to be read.
func known(words []string) string {
	const most = 30
	if len(words) == 0 || len(words) > most {
		return ""
	}
	return "; known are " + strings.Join(words, ", ")
}
