package trees_test

// peaks collects the most memory that commands and supervisors had.
type peaks struct{}

func (p *peaks) watch(string, int) func() { return func() {} }
