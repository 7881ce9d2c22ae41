// Package failpoint lets a test end or halt pyro between two particular steps,
// to see that the next command puts right what is half done.
//
// A program has failpoints only if it is built with the tag of the same name;
// in all others [Hit] is empty, and the compiler leaves nothing of it. A
// failpoint is called OPERATION/STEP, after the step that has just been done.
package failpoint

// Variable is the environment variable that arms one failpoint: NAME kills the
// process that comes there, as kill -9 does; NAME=stop halts it as SIGSTOP does,
// the first time that it comes there, until somebody sends SIGCONT.
const Variable = "PYRO_FAILPOINT"
