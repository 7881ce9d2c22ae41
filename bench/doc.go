// Package bench measures pyro against something named, in one run, and prints
// the ratios: a number alone says more about the machine than about pyro.
//
// Every benchmark measures its pairs alternately and reports medians, because
// the machines this runs on are shared and noisy.
package bench
