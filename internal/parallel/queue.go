package parallel

// A Queue runs functions side by side, and has their results taken in the order in which
// they were added. Functions have goroutines of their own; all else is on that of its user.
// Whoever has made one calls Wait when done with it, in any case.
type Queue[T any] struct {
	limit   int
	take    func(T) error
	waiting []chan answer[T] // under way, or not yet taken; the oldest first
}

type answer[T any] struct {
	v   T
	err error
}

// NewQueue returns a queue that runs up to limit functions at a time, and has take take
// their results.
func NewQueue[T any](limit int, take func(T) error) *Queue[T] {
	return &Queue[T]{limit: max(limit, 1), take: take}
}

// Add begins a function. If as many as may be are under way, it waits for the oldest of
// them first, and takes its result. It returns the error of that, after which nothing is to
// be added.
func (q *Queue[T]) Add(fn func() (T, error)) error {
	for len(q.waiting) >= q.limit {
		if err := q.next(); err != nil {
			return err
		}
	}
	c := make(chan answer[T], 1)
	q.waiting = append(q.waiting, c)
	go func() {
		var a answer[T]
		a.err = Catch(func() (err error) {
			a.v, err = fn()
			return err
		})
		c <- a
	}()
	return nil
}

// End takes the results of all that are under way, up to the first error, which it returns.
func (q *Queue[T]) End() error {
	for len(q.waiting) > 0 {
		if err := q.next(); err != nil {
			return err
		}
	}
	return nil
}

// Wait waits for the end of all that are under way. Their results are not taken.
func (q *Queue[T]) Wait() {
	for _, c := range q.waiting {
		<-c
	}
	q.waiting = nil
}

// next takes the result of the oldest. If that has panicked, it panics.
func (q *Queue[T]) next() error {
	a := <-q.waiting[0]
	q.waiting = q.waiting[1:]
	Throw(a.err)
	if a.err != nil {
		return a.err
	}
	return q.take(a.v)
}
