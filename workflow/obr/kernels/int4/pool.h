// Threads that stay: starting one takes as long as a small product. PyTorch's own where they can be had, since these
// keep their cores busy for a while after each of its operations, which others would have to wait for.

#pragma once
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

class Pool {
   public:
    // work(): called once in each of `threads` threads, this one among them; returns when all have returned.
    static void run(int threads, const std::function<void()>& work) {
        if (threads <= 1) return work();
        // GNU OpenMP, as a build of PyTorch brings it along; after a fork it lacks its threads and would wait forever.
        static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        if (parallel != nullptr && loaded_in == getpid()) return parallel(call, (void*)&work, unsigned(threads), 0);
        static std::mutex one_at_a_time;
        std::lock_guard<std::mutex> alone(one_at_a_time);
        static Pool* pool = nullptr;  // never freed: its threads wait in it until the process ends
        if (pool == nullptr || pool->owner_ != getpid()) pool = new Pool;  // a fork has no threads
        pool->share(threads - 1, work);
    }

   private:
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

    static inline const pid_t loaded_in = getpid();

    static void call(void* work) { (*static_cast<const std::function<void()>*>(work))(); }

    void share(int helpers, const std::function<void()>& work) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; started_ < helpers; ++started_) std::thread(&Pool::help, this).detach();
            work_ = &work;
            wanted_ = helpers;
            running_ = helpers;
        }
        called_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

    void help() {
        for (;;) {
            spin_until_wanted();
            std::unique_lock<std::mutex> lock(mutex_);
            called_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            const std::function<void()>& work = *work_;
            lock.unlock();
            work();
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    // The next product of a model follows within microseconds; to fall asleep and wake up takes longer.
    void spin_until_wanted() const {
        const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
        while (wanted_ == 0 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    }

    const pid_t owner_ = getpid();
    std::mutex mutex_;
    std::condition_variable called_, done_;
    const std::function<void()>* work_ = nullptr;
    std::atomic<int> wanted_{0};
    int started_ = 0, running_ = 0;
};
